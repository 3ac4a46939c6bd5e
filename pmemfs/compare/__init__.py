"""The four answers of 2015 side by side: one pool each, one workload, one table."""
