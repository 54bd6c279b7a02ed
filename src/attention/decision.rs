//! The choice that all ranks make alike, from what each node has found.

use serde::{Deserialize, Serialize};

use super::case::Case;
use super::machine::Machine;
use super::outcome::Tried;
use super::trial::Unavailable;
use crate::collective::Collective;
use crate::collective::agreement::agree;
use crate::error::{Error, Result};
use crate::libtorch::AttentionBackend;
use crate::nn::attention::AttentionChoice;
use crate::pulse;

/// Times that differ by less are equal: medians of a few passes vary by some percent, and nodes
/// would choose by chance.
const NOISE: f64 = 1.05;

/// What one node has found, small enough to be sent to all ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeReport {
    verdicts: Vec<Verdict>,
    /// A warning if nothing could be tried.
    unavailable: Option<String>,
}

/// One backend over all cases with a mask, or over all without.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Verdict {
    backend: AttentionBackend,
    masked: bool,
    /// Time of all cases together if it is sound in each of them.
    milliseconds: Option<f64>,
    /// A warning if it is wrong in one of them.
    warning: Option<String>,
}

impl NodeReport {
    /// Sums up a trial on this node.
    pub fn new(machine: &Machine, tried: &[Tried]) -> Self {
        let mut verdicts = Vec::new();
        for masked in [false, true] {
            for backend in AttentionBackend::ALL {
                let own: Vec<&Tried> = tried
                    .iter()
                    .filter(|tried| tried.backend == backend && tried.case.masked == masked)
                    .collect();
                if !own.is_empty() {
                    verdicts.push(verdict(machine, backend, masked, &own));
                }
            }
        }
        NodeReport { verdicts, unavailable: None }
    }

    /// The report of a node on which no backend could be tried.
    pub fn unavailable(why: &Unavailable) -> Self {
        let what = format!(
            "attention cannot be tried on {}: {why}; the plain backend computes it",
            pulse::host()
        );
        NodeReport { verdicts: Vec::new(), unavailable: Some(what) }
    }
}

fn verdict(
    machine: &Machine,
    backend: AttentionBackend,
    masked: bool,
    tried: &[&Tried],
) -> Verdict {
    let times: Option<Vec<f64>> = tried.iter().map(|tried| tried.outcome.milliseconds()).collect();
    let fault = tried.iter().find_map(|tried| Some((tried.outcome.fault()?, tried.case)));
    let warning = fault.map(|(fault, case)| {
        let (host, library) = (pulse::host(), machine.library_of(backend));
        format!("attention by {backend} ({library}) is left out on {host}: {case}: {fault}")
    });
    Verdict { backend, masked, milliseconds: times.map(|times| times.iter().sum()), warning }
}

/// The backends of a run, and what the log says of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    pub choice: AttentionChoice,
    pub lines: Vec<String>,
    pub warnings: Vec<String>,
}

/// Gathers every node's report and decides alike on all ranks. `own`: the report of the rank that
/// tried for its node.
///
/// # Errors
/// Errors of the collective.
///
/// # Ordering
/// Every rank of `world` calls it.
pub fn common(own: Option<&NodeReport>, world: &dyn Collective) -> Result<Decision> {
    let text = serde_json::to_string(&own).expect("finite numbers and texts are JSON");
    let texts = agree(Ok(text), world)?;
    let reports: std::result::Result<Vec<Option<NodeReport>>, _> =
        texts.iter().map(|text| serde_json::from_str(text)).collect();
    let reports = reports.map_err(|error| Error::Collective {
        backend: "attention",
        operation: "gather",
        what: error.to_string(),
    })?;
    Ok(Decision::of(&reports.into_iter().flatten().collect::<Vec<_>>()))
}

impl Decision {
    /// Decides by the reports of all nodes: the fastest backend that is sound on every one, with a
    /// mask and without.
    pub fn of(reports: &[NodeReport]) -> Self {
        let mut lines = Vec::new();
        let [unmasked, masked] = [false, true].map(|masked| {
            let known = times(reports, masked);
            let chosen = fastest(&known);
            if !known.is_empty() {
                lines.push(line(masked, chosen, &known));
            }
            chosen
        });
        let of_node = |report: &NodeReport| -> Vec<String> {
            let left_out = report.verdicts.iter().filter_map(|verdict| verdict.warning.clone());
            report.unavailable.iter().cloned().chain(left_out).collect()
        };
        let warnings = reports.iter().flat_map(of_node).collect();
        Decision { choice: AttentionChoice { unmasked, masked }, lines, warnings }
    }
}

/// A backend that is sound on every node, and its time on the slowest one.
#[derive(Clone, Copy)]
struct Timed {
    backend: AttentionBackend,
    milliseconds: f64,
}

/// Returns the backends that are sound on every node, in the order of [`AttentionBackend::ALL`].
fn times(reports: &[NodeReport], masked: bool) -> Vec<Timed> {
    let on_node = |report: &NodeReport, backend| {
        let found = report
            .verdicts
            .iter()
            .find(|verdict| verdict.backend == backend && verdict.masked == masked)?;
        found.milliseconds
    };
    let everywhere = |backend| {
        let times: Option<Vec<f64>> =
            reports.iter().map(|report| on_node(report, backend)).collect();
        let milliseconds = times?.into_iter().reduce(f64::max)?;
        Some(Timed { backend, milliseconds })
    };
    AttentionBackend::ALL.into_iter().filter_map(everywhere).collect()
}

fn fastest(known: &[Timed]) -> AttentionBackend {
    let least = known.iter().map(|timed| timed.milliseconds).fold(f64::INFINITY, f64::min);
    known
        .iter()
        .find(|timed| timed.milliseconds <= NOISE * least)
        .map_or(AttentionBackend::Plain, |timed| timed.backend)
}

fn line(masked: bool, chosen: AttentionBackend, known: &[Timed]) -> String {
    let times: Vec<String> = known
        .iter()
        .map(|timed| format!("{} {:.2} ms", timed.backend, timed.milliseconds))
        .collect();
    format!("attention {} a mask: {chosen}; {}", with(masked), times.join(", "))
}

fn with(masked: bool) -> &'static str {
    if masked { "with" } else { "without" }
}

/// Decides as the configuration asks, without a trial. Where `backend` does not compute one of the
/// run's cases, the efficient one does, or else the plain one.
pub fn asked(backend: AttentionBackend, cases: &[Case]) -> Decision {
    let mut lines = Vec::new();
    let [unmasked, masked] = [false, true].map(|masked| {
        let alike = || cases.iter().filter(|case| case.masked == masked);
        let refused = alike().find(|case| !case.is_taken_by(backend));
        let chosen = [backend, AttentionBackend::Efficient]
            .into_iter()
            .find(|candidate| alike().all(|case| case.is_taken_by(*candidate)))
            .unwrap_or(AttentionBackend::Plain);
        let why = refused
            .map_or(String::new(), |case| format!(", because {backend} does not compute {case}"));
        if alike().next().is_some() {
            lines.push(format!(
                "attention {} a mask: {chosen}, for compute.attention = \"{backend}\"{why}",
                with(masked)
            ));
        }
        chosen
    });
    Decision { choice: AttentionChoice { unmasked, masked }, lines, warnings: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{Errors, Outcome, Precision};
    use crate::collective::Threads;
    use AttentionBackend::{Cudnn, Efficient, Flash, Plain};

    const CASE: Case = Case {
        precision: Precision::Bfloat16,
        heads: 8,
        width: 128,
        queries: 1536,
        keys: 1536,
        masked: false,
    };

    fn sound(milliseconds: f64) -> Outcome {
        let errors = Errors { output: 1e-3, query: 1e-3, key: 1e-3, value: 1e-3 };
        Outcome::Sound { errors, milliseconds }
    }

    fn report(outcomes: &[(AttentionBackend, Outcome)]) -> NodeReport {
        let tried = outcomes.iter().cloned();
        let tried: Vec<Tried> =
            tried.map(|(backend, outcome)| Tried { backend, case: CASE, outcome }).collect();
        let machine = Machine { cudnn: Some("9.19.0".into()), ..Machine::default() };
        NodeReport::new(&machine, &tried)
    }

    fn chosen(reports: &[NodeReport]) -> AttentionBackend {
        Decision::of(reports).choice.unmasked
    }

    #[test]
    fn the_fastest_sound_one_is_chosen_and_a_tie_goes_by_the_order() {
        for (flash, cudnn, expected) in
            [(1.0, 0.5, Cudnn), (1.0, 0.97, Flash), (1.0, 0.94, Cudnn), (0.97, 1.0, Flash)]
        {
            let report =
                report(&[(Flash, sound(flash)), (Cudnn, sound(cudnn)), (Plain, sound(9.0))]);
            assert_eq!(chosen(&[report]), expected, "{flash} and {cudnn}");
        }
        assert_eq!(chosen(&[]), Plain);
        assert_eq!(Decision::of(&[]).lines.len(), 0);
    }

    #[test]
    fn a_backend_that_is_wrong_in_one_case_is_left_out_with_library_and_version() {
        let ended = Outcome::Ended { how: "ended by SIGSEGV".into() };
        let report = report(&[
            (Cudnn, sound(0.1)),
            (Cudnn, ended),
            (Flash, Outcome::NotTaken),
            (Plain, sound(9.0)),
        ]);
        let decision = Decision::of(&[report]);
        assert_eq!(decision.choice, AttentionChoice { unmasked: Plain, masked: Plain });
        assert_eq!(decision.lines, ["attention without a mask: plain; plain 9.00 ms"]);
        let [warning] = decision.warnings.try_into().expect("one warning");
        let expected = format!(
            "attention by cudnn (cuDNN 9.19.0) is left out on {}: 1536 x 1536 tokens, 8 heads of 128, \
             bfloat16, no mask: ended by SIGSEGV",
            pulse::host()
        );
        assert_eq!(warning, expected);
    }

    #[test]
    fn ranks_that_disagree_agree_on_what_is_sound_and_fast_on_all_nodes() {
        let decisions = Threads::run(3, |world| {
            let own = match world.rank() {
                0 => Some(report(&[(Flash, sound(1.0)), (Cudnn, sound(0.5)), (Plain, sound(9.0))])),
                1 => {
                    let wrong = Outcome::NotFinite { why: "the output".into() };
                    Some(report(&[(Flash, sound(3.0)), (Cudnn, wrong), (Plain, sound(9.0))]))
                }
                // The second rank of a node tries nothing.
                _ => None,
            };
            common(own.as_ref(), world).expect("a sound world")
        });
        for decision in &decisions {
            assert_eq!(*decision, decisions[0]);
        }
        assert_eq!(decisions[0].choice.unmasked, Flash);
        assert_eq!(
            decisions[0].lines,
            ["attention without a mask: flash; flash 3.00 ms, plain 9.00 ms"]
        );
        assert!(decisions[0].warnings[0].ends_with(": the output is not finite"));
        // A node that could try nothing knows of no sound backend.
        let without_a_gpu = NodeReport::unavailable(&Unavailable("no GPU 0".into()));
        let decision = Decision::of(&[report(&[(Flash, sound(1.0))]), without_a_gpu]);
        assert_eq!(decision.choice.unmasked, Plain);
        let [warning] = decision.warnings.try_into().expect("one warning");
        let expected = format!("attention cannot be tried on {}: no GPU 0; the", pulse::host());
        assert!(warning.starts_with(&expected), "{warning}");
    }

    #[test]
    fn what_is_asked_for_is_done_where_it_can_be() {
        let masked = Case { masked: true, ..CASE };
        let float32 = Case { precision: Precision::Float32, ..CASE };
        let odd = Case { width: 12, masked: true, ..CASE };
        for (backend, cases, expected) in [
            (Flash, vec![CASE, masked], [Flash, Efficient]),
            (Flash, vec![float32], [Efficient, Flash]),
            (Cudnn, vec![CASE, masked], [Cudnn, Cudnn]),
            (Cudnn, vec![CASE, masked, odd], [Cudnn, Plain]),
            (Efficient, vec![CASE, masked], [Efficient, Efficient]),
            (Plain, vec![CASE, masked], [Plain, Plain]),
        ] {
            let choice = asked(backend, &cases).choice;
            assert_eq!([choice.unmasked, choice.masked], expected, "{backend} {cases:?}");
        }
        assert_eq!(
            asked(Flash, &[CASE, masked]).lines,
            [
                "attention without a mask: flash, for compute.attention = \"flash\"",
                "attention with a mask: efficient, for compute.attention = \"flash\", because flash does \
                 not compute 1536 x 1536 tokens, 8 heads of 128, bfloat16, mask"
            ]
        );
    }
}
