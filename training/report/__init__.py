"""A run as one HTML page: what it learnt, where the time went, and its episodes token by token."""
