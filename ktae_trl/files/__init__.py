"""The files of a run's folder. They are written atomically, never through links, and by one program at a time."""
