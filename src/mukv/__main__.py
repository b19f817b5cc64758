from mukv.cli import main

main()
