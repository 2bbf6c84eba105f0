"""Read rollouts that any trainer saved: one file per format, each with a function from a raw row to `Rollout`s.

    paths -> sources (files, raw rows) -> formats (which format) -> a format's read(row, place) -> Rollout
    index (pass 1: which groups there are; pass 2: the rollouts of the chosen ones) -> explaining (records of a page)

To add a format, write its file and add its line to `formats.FORMATS`.
"""
