"""Pure folds over events that give findings."""
