"""What a run's folder holds, and how it is written: atomically, never through a link, by one program at a time."""
