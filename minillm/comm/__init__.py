"""Communication between ranks: transports, ledger, agreement, start and end of processes."""
