"""How tokens hear of concepts. To add one: a file with a class, a line here."""

from mukv.model.concept.injection.base import CONCEPT, Injection, InjectionInputs, Joint, Lasting
from mukv.model.concept.injection.cross import Cross
from mukv.model.concept.injection.prefix import Prefix
from mukv.model.concept.injection.residual import Residually

INJECTIONS: dict[str, type[Injection]] = {
    "residual": Residually,
    "prefix": Prefix,
    "cross": Cross,
}
AnyInjection = Residually | Prefix | Cross

__all__ = [
    "CONCEPT",
    "INJECTIONS",
    "AnyInjection",
    "Cross",
    "Injection",
    "InjectionInputs",
    "Joint",
    "Lasting",
    "Prefix",
    "Residually",
]
