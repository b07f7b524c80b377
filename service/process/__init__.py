"""One host: supervisor, server, sockets, cpu_count."""
