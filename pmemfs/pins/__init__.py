"""Pages in the hands of programs: what the daemon knows of the pages that clients have mapped."""
