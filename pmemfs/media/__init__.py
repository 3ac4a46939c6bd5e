"""What is stored on a pool: each structure declared once, nothing that runs."""
