from moeify.ir.report import BlockReport, Report  # noqa: F401  (moved)
