"""What is known of a pool and its mount, as frozen values from which every report is made."""
