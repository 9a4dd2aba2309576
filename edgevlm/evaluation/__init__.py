"""One evaluation for every family: suites of questions, bundles and PyTorch models side by side, and how they differ."""
