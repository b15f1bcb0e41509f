import sys

from e3va_mm.doctor.report import report

if __name__ == '__main__':
    sys.exit(report())
