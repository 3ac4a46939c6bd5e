"""What is stored on a pool: every structure is declared once here, and nothing here runs."""
