//! Outcomes of a trial as texts: a line a case for the log, a table for `fm-dist doctor --gpu`.

use super::case::Case;
use super::outcome::{Errors, Outcome, Tried};

/// Returns one line for each case, with all backends.
pub fn lines(tried: &[Tried]) -> Vec<String> {
    let mut cases: Vec<Case> = Vec::new();
    for Tried { case, .. } in tried {
        if !cases.contains(case) {
            cases.push(*case);
        }
    }
    let of_case = |case: &Case| {
        let own = tried.iter().filter(|tried| tried.case == *case);
        let told: Vec<String> =
            own.map(|tried| format!("{} {}", tried.backend, tried.outcome)).collect();
        format!("attention of {case}: {}", told.join("; "))
    };
    cases.iter().map(of_case).collect()
}

const HEAD: [&str; 6] = ["case", "backend", "outcome", "output", "gradients", "ms"];

/// Returns a table with the columns case, backend, outcome, error of the output, largest error of a
/// gradient, and milliseconds.
pub fn table(tried: &[Tried]) -> String {
    let mut rows = vec![HEAD.map(String::from)];
    rows.extend(tried.iter().map(row));
    let widths: [usize; 6] = std::array::from_fn(|column| {
        rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
    });
    let line = |row: &[String; 6]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

fn row(Tried { backend, case, outcome }: &Tried) -> [String; 6] {
    let (errors, milliseconds): (Option<&Errors>, _) = match outcome {
        Outcome::Sound { errors, milliseconds } => (Some(errors), Some(*milliseconds)),
        Outcome::Differs { errors, .. } => (Some(errors), None),
        _ => (None, None),
    };
    let word = if outcome.is_sound() { "sound".into() } else { outcome.to_string() };
    let number = |error: Option<f64>| error.map_or("-".into(), |error| format!("{error:.1e}"));
    [
        case.to_string(),
        backend.to_string(),
        word,
        number(errors.map(|errors| errors.output)),
        number(errors.map(Errors::gradients)),
        milliseconds.map_or("-".into(), |milliseconds| format!("{milliseconds:.2}")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Precision;
    use crate::libtorch::AttentionBackend::{Cudnn, Flash};

    fn tried() -> Vec<Tried> {
        let case = Case {
            precision: Precision::Bfloat16,
            heads: 8,
            width: 128,
            queries: 4096,
            keys: 512,
            masked: false,
        };
        let errors = Errors { output: 2.1e-3, query: 4e-3, key: 3e-3, value: 2e-3 };
        let ended = Outcome::Ended { how: "ended by SIGSEGV".into() };
        vec![
            Tried {
                backend: Flash,
                case,
                outcome: Outcome::Sound { errors, milliseconds: 0.8125 },
            },
            Tried { backend: Cudnn, case, outcome: ended },
            Tried {
                backend: Flash,
                case: Case { masked: true, ..case },
                outcome: Outcome::NotTaken,
            },
        ]
    }

    #[test]
    fn a_case_is_a_line_of_the_log() {
        assert_eq!(
            lines(&tried()),
            [
                "attention of 4096 x 512 tokens, 8 heads of 128, bfloat16, no mask: \
                 flash 0.81 ms, off by 2.1e-3 and 4.0e-3; cudnn ended by SIGSEGV",
                "attention of 4096 x 512 tokens, 8 heads of 128, bfloat16, mask: flash does not take it",
            ]
        );
    }

    #[test]
    fn a_table_has_a_row_for_each_backend_and_case() {
        let expected = "\
case                                                  backend  outcome           output  gradients  ms
4096 x 512 tokens, 8 heads of 128, bfloat16, no mask  flash    sound             2.1e-3  4.0e-3     0.81
4096 x 512 tokens, 8 heads of 128, bfloat16, no mask  cudnn    ended by SIGSEGV  -       -          -
4096 x 512 tokens, 8 heads of 128, bfloat16, mask     flash    does not take it  -       -          -
";
        assert_eq!(table(&tried()), expected);
    }
}
