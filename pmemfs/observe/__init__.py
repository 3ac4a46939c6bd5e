"""What is known of a pool and of its mount, as frozen values that every report is made of."""
