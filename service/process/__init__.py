"""One host: supervisor, server, watchdog, sockets, cpu_count. What they run is handed in by `service/__main__.py`."""
