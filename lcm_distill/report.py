"""Writes a run's report: one HTML file with its curves, its pictures over time, its flags and the command to resume.

    python -m lcm_distill.report lcm-sd15

writes lcm-sd15/report.html from lcm-sd15/training.jsonl and lcm-sd15/validation/step-*.png, as the training programs
do at every validation. It works at any time, also while the run trains, and for a folder copied from another machine.
The file needs no network and no other file: open it in a browser, or send it to someone.
"""

from lcm_distill.errors import UsageError, run_program, shown
from lcm_distill.flags import CommandParser, path
from lcm_distill.run.report import build_report


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("python -m lcm_distill.report", __doc__, "%(prog)s OUTPUT_DIR")
    parser.add_argument("output_dir", type=path, metavar="OUTPUT_DIR", help="the run's --output_dir")
    output_dir = parser.parse_args(argv).output_dir
    try:
        report = build_report(output_dir)
    except OSError as error:
        raise UsageError(
            f"{output_dir}: the report could not be written ({error}); free disk space, or copy the folder."
        ) from None
    print(f"{shown(str(report))}: {report.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_program(main, resume_hint="")
