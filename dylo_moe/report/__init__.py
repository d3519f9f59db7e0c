"""What a person looks at: terminal tables, charts and HTML pages."""
