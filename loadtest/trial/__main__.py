"""`python -m loadtest.trial` is `holdfast-loadtest`."""

from loadtest.trial.command import main

main(prog_name="holdfast-loadtest")
