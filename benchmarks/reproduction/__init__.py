"""The paper's findings in miniature: trainings, measurements on a test split, and the page that they fill."""
