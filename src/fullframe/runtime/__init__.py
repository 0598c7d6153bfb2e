"""Runs a plan: tasks of tiles, their bytecode, sums, worker threads, and replays on processors and devices."""
