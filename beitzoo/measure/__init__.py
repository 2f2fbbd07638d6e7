"""What a model costs and reaches, as rows of CSV files."""
