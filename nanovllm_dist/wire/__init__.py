"""What crosses a process boundary (`messages`) and how it travels (`sockets`)."""
