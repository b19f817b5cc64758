"""Processes connect, print which ones they wait for, and refuse bad addresses."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from mukv.core.errors import BadInput, Failed
from mukv.train import rendezvous
from mukv.train.rendezvous import Place, meet, parse


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("localhost:9000,2,1", Place("localhost", 9000, 2, 1)),
        ("127.0.0.1:1,1,0", Place("127.0.0.1", 1, 1, 0)),
        ("[::1]:9000,2,0", Place("::1", 9000, 2, 0)),
    ],
)
def test_addresses(text, place):
    assert parse(text) == place
    assert text.startswith(f"{place.address},")


@pytest.mark.parametrize(
    "text",
    [
        *("localhost:99999,2,0", "localhost:0,2,0", ":9000,2,0", "localhost,2,0", "", "auto,2,0"),
        *("HOST:PORT,0,0", "localhost:9000,0,0", "localhost:9000,70000,0", "localhost:9000,2,2"),
        *(f"localhost:9000,{10**9},0", f"localhost:9000,2,{10**40}", "::1:9000,2,0"),
        *("nohost.invalid:9000,2,0", "localhost:9000,-1,0", "localhost:9000,2,0,0", "é:9000,2,0"),
        *(
            "localhost:90\u0660\u0660,2,0",
            "local host:9000,2,0",
            "a" * 70 + ":9000,2,0",
            "\0:1,2,0",
        ),
    ],
)
def test_what_can_not_be_an_address(text):
    with pytest.raises(BadInput, match="--distributed"):
        parse(text)


@pytest.mark.parametrize(("number", "whom"), [(0, "process 1, 2 of 3"), (1, "process 0 of 3")])
def test_a_process_names_those_it_waits_for_and_gives_up(monkeypatch, port, number, whom):
    monkeypatch.setattr(rendezvous, "TELL_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous, "WAIT_SECONDS", 0.8)
    told: list[str] = []
    with pytest.raises(Failed, match=f"{whom} did not come"):
        meet(Place("127.0.0.1", port, 3, number), told.append)
    assert told == [f"waiting for {whom} at 127.0.0.1:{port} (up to 1 s)"]
    assert rendezvous.TELL_SECONDS < 10


def test_a_port_in_use(port):
    with socket.create_server(("", port)), pytest.raises(BadInput, match="a PORT that is free"):
        meet(Place("127.0.0.1", port, 2, 0), print)


@pytest.mark.parametrize(
    ("processes", "message"), [(2, "started for 3 processes"), (3, "another process 1")]
)
def test_a_process_of_another_plan(monkeypatch, port, processes, message):
    monkeypatch.setattr(rendezvous, "WAIT_SECONDS", 3)
    waits = threading.Thread(target=first, args=(port,))
    waits.start()
    with socket.create_connection(wait_for(port)) as early:
        early.sendall(b"mukv 1 3\n")
        with pytest.raises(BadInput, match=message):
            meet(Place("127.0.0.1", port, processes, 1), print)
    waits.join()


def first(port: int) -> None:
    try:
        meet(Place("127.0.0.1", port, 3, 0), lambda _: None)
    except (BadInput, Failed):
        return


def wait_for(port: int) -> tuple[str, int]:
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return "127.0.0.1", port
        except OSError:
            threading.Event().wait(0.02)
    raise AssertionError("nobody listens")


def test_a_wait_for_the_cluster_is_reported(monkeypatch):
    monkeypatch.setattr(rendezvous, "TELL_SECONDS", 0.01)
    said: list[str] = []
    with rendezvous.telling_wait("the other processes", said.append):
        while not said:
            time.sleep(0.01)
    assert said[0] == "waiting for the other processes (up to 300 s)"
