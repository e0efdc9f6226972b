"""The exercises of each chapter: statement, properties, hints, wrong answers, a solution."""
