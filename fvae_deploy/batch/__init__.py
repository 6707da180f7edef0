"""Many scans or generations, through one engine or on Ray."""
