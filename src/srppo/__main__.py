"""`python -m srppo` is `srppo`."""

from srppo.cli import main

main()
