"""Pages for people: self-contained HTML, plots in SVG, no script and no request to anywhere."""
