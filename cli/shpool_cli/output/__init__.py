"""The results of a batch: as JSON Lines, CSV or Parquet, written so that a reader never takes a part for the whole."""
