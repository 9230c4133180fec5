"""What everything else stands on: errors, paths, files, the run store, the process."""
