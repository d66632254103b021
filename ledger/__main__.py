"""`python -m ledger` is the command line `govledger`."""

from ledger.service.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
