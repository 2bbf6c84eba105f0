"""What a run's folder holds, and how it is written: at once or not at all, never through a link, by one program."""
