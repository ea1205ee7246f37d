"""Plans say what a run costs on devices that need not be here."""

ORDER = ('chips', 'flops', 'hlo', 'programs', 'costs', 'table', 'fit', 'plan', '__init__')
