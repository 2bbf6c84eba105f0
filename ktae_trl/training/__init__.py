"""What a run does around the trainer's steps: it starts, shows itself, stops, and resumes."""
