"""Evidence: what reconstructions keep of CTs, as one page for readers, JSON and CSV."""
