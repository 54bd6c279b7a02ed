//! A backend of attention that crashes, hangs or computes wrongly is left out, and its trial never
//! harms the program. libtorch's two backends of a CPU stand for a GPU's four.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fm_dist::attention::{
    Case, Decision, Limits, Machine, NodeReport, Outcome, Precision, Trial, Tried, Unavailable,
};
use fm_dist::files::cache::Cache;
use fm_dist::libtorch::AttentionBackend::{self, Cudnn, Efficient, Flash, Plain};
use tempfile::TempDir;

use crate::runs::{finish, program, running};

const CASE: Case = Case {
    precision: Precision::Bfloat16,
    heads: 2,
    width: 32,
    queries: 192,
    keys: 192,
    masked: false,
};

fn machine() -> Machine {
    let text = |words: &str| Some(words.to_string());
    Machine {
        gpu: text("none"),
        driver: text("none"),
        libtorch: text("2.13.0"),
        cudnn: text("9.20.0"),
    }
}

/// A trial on the CPU by the real program.
pub fn trial(fault: Option<&str>) -> Trial {
    Trial {
        program: env!("CARGO_BIN_EXE_fm-dist").into(),
        gpu: None,
        limits: Limits::default(),
        cache: None,
        machine: machine(),
        fault: fault.map(String::from),
    }
}

fn outcome(tried: &[Tried], backend: AttentionBackend, case: &Case) -> Outcome {
    let found = tried.iter().find(|tried| tried.backend == backend && tried.case == *case);
    found.unwrap().outcome.clone()
}

/// Two cases without a mask and one with.
fn cases() -> [Case; 3] {
    [CASE, Case { keys: 72, ..CASE }, Case { masked: true, ..CASE }]
}

#[test]
fn every_backend_is_tried_in_every_case_and_the_fastest_sound_one_is_chosen() {
    let tried = trial(None).run(&cases()).unwrap().tried;
    assert_eq!(tried.len(), 12);
    for case in cases() {
        assert!(outcome(&tried, Plain, &case).is_sound(), "{tried:?}");
        for backend in [Cudnn, Efficient] {
            assert_eq!(outcome(&tried, backend, &case), Outcome::NotTaken);
        }
    }
    assert!(outcome(&tried, Flash, &CASE).is_sound(), "{tried:?}");
    // No GPU has one for masks, so that it is not even asked.
    assert_eq!(outcome(&tried, Flash, &cases()[2]), Outcome::NotTaken);
    let decision = Decision::of(&[NodeReport::new(&machine(), &tried)]);
    assert_eq!(decision.warnings, [""; 0]);
    assert_eq!(decision.choice.masked, Plain);
}

/// Outcome of the CPU's fused backend in the first case, where the fault strikes; the plain one is
/// not harmed, is chosen, and the log has one warning.
fn struck(fault: &str) -> Outcome {
    let trial = Trial {
        limits: Limits { start: Duration::from_secs(60), cases: Duration::from_secs(3) },
        ..trial(Some(fault))
    };
    let tried = trial.run(&cases()).unwrap().tried;
    for case in cases() {
        assert!(outcome(&tried, Plain, &case).is_sound(), "{fault}: {tried:?}");
    }
    let decision = Decision::of(&[NodeReport::new(&machine(), &tried)]);
    assert_eq!(decision.choice.unmasked, Plain, "{fault}: {tried:?}");
    let [warning] = decision.warnings.as_slice() else { panic!("{:?}", decision.warnings) };
    assert!(
        warning.starts_with("attention by flash (libtorch 2.13.0) is left out on "),
        "{warning}"
    );
    outcome(&tried, Flash, &CASE)
}

#[test]
fn a_backend_that_ends_its_process_is_left_out() {
    for (fault, how) in [
        ("segv", "ended by SIGSEGV"),
        ("abort", "ended by SIGABRT"),
        ("exit", "ended with exit code 3"),
        ("device", "ended with exit code 23: CUDA error: an illegal memory access was encountered"),
    ] {
        let Outcome::Ended { how: found } = struck(&format!("{fault}@0:1:attention")) else {
            panic!("{fault}")
        };
        assert!(found.starts_with(how), "{fault}: {found}");
    }
}

#[test]
fn a_backend_that_hangs_is_left_out_in_time() {
    for fault in ["spin", "stop"] {
        let began = Instant::now();
        let how = "took longer than 3s".to_string();
        assert_eq!(struck(&format!("{fault}@0:1:attention")), Outcome::Ended { how });
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
        assert_eq!(running(&format!("{fault}@0:1:attention")), [""; 0], "a child is left over");
    }
}

#[test]
fn a_backend_with_wrong_numbers_is_left_out() {
    let Outcome::Differs { errors, why } = struck("spike@0:1:attention:1.05") else { panic!() };
    assert!((errors.output - 0.05).abs() < 0.01, "{errors:?}");
    assert!(why.starts_with("the output is off by 5"), "{why}");
    for (fault, name) in [("nan_loss", "the output"), ("nan_grad", "the gradient of the query")] {
        let why = name.to_string();
        assert_eq!(struck(&format!("{fault}@0:1:attention")), Outcome::NotFinite { why });
    }
}

#[test]
fn what_ends_a_trial_from_outside_says_nothing_of_a_backend_for_good() {
    for (fault, told) in
        [("out_of_memory", "ended with exit code 53"), ("kill", "ended by SIGKILL")]
    {
        let outcome = struck(&format!("{fault}@0:1:attention"));
        assert!(!outcome.is_lasting(), "{outcome:?}");
        let Outcome::Disturbed { how } = outcome else { panic!("{outcome:?}") };
        assert!(how.starts_with(told), "{fault}: {how}");
    }
}

#[test]
fn a_device_that_cannot_be_opened_is_told() {
    let nowhere = Trial { gpu: Some(999), ..trial(None) };
    let Err(Unavailable(why)) = nowhere.run(&[CASE]) else { panic!("it was tried") };
    let known = ["no GPU 999: libtorch finds ", "cannot open libtorch_cuda.so ("];
    assert!(known.iter().any(|words| why.starts_with(words)), "{why}");
    let nothing = Trial { program: "/bin/true".into(), ..trial(None) };
    let ended = Unavailable("a trial ended with exit code 0".into());
    assert_eq!(nothing.run(&[CASE]), Err(ended));
}

/// A program that cannot be started, so that outcomes come from the cache or not at all.
fn without_a_program(trial: &Trial) -> Trial {
    Trial { program: "/nowhere/fm-dist".into(), ..trial.clone() }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).map(|entries| entries.map(|entry| entry.unwrap().path()));
    entries.map(|paths| paths.collect()).unwrap_or_default()
}

#[test]
fn what_was_tried_once_on_this_machine_is_known() {
    let root = TempDir::new().unwrap();
    let trial = Trial { cache: Some(Cache::new(root.path(), "attention")), ..trial(None) };
    let findings = trial.run(&cases()).unwrap();
    assert_eq!(findings.not_kept, None);
    let entries = files(&root.path().join("attention"));
    assert_eq!(entries.len(), 2, "with a mask and without");
    let known = without_a_program(&trial);
    assert_eq!(known.run(&cases()), Ok(findings));

    let other_machine = Machine { cudnn: Some("9.22.0".into()), ..machine() };
    let unknown = [
        without_a_program(&Trial { machine: other_machine, ..trial.clone() }),
        without_a_program(&Trial { machine: Machine::default(), ..trial.clone() }),
        without_a_program(&Trial { cache: None, ..trial.clone() }),
        without_a_program(&Trial { fault: Some("segv@0:1:attention".into()), ..trial.clone() }),
    ];
    for unknown in unknown {
        assert!(unknown.run(&cases()).is_err(), "{unknown:?}");
    }
    assert!(known.run(&[Case { width: 16, ..CASE }]).is_err(), "another case");

    for entry in &entries {
        let mut bytes = fs::read(entry).unwrap();
        bytes.truncate(bytes.len() / 2);
        fs::write(entry, bytes).unwrap();
    }
    assert!(known.run(&cases()).is_err(), "torn entries are none");
    trial.run(&cases()).unwrap();
    assert!(known.run(&cases()).is_ok(), "and are written anew");
}

#[test]
fn what_cannot_be_kept_is_tried_each_time() {
    let root = TempDir::new().unwrap();
    let kept = |trial: &Trial| {
        let cache = Some(Cache::new(root.path(), "attention"));
        Trial { cache, ..trial.clone() }.run(&[CASE]).unwrap();
        files(&root.path().join("attention")).len()
    };
    assert_eq!(kept(&Trial { machine: Machine::default(), ..trial(None) }), 0);
    assert_eq!(kept(&trial(Some("segv@0:1:attention"))), 0, "a fault made on purpose");
    let file = root.path().join("file");
    fs::write(&file, "").unwrap();
    let unwritable = Trial { cache: Some(Cache::new(&file, "attention")), ..trial(None) };
    let not_kept = unwritable.run(&[CASE]).unwrap().not_kept.unwrap();
    assert!(not_kept.starts_with("cannot create "), "{not_kept}");
}

#[test]
fn a_doctor_asked_for_a_gpu_names_what_it_lacks() {
    let mut doctor = program(&["doctor", "--gpu"]);
    doctor.env("CUDA_VISIBLE_DEVICES", "");
    let (code, text, errors) = finish(doctor);
    assert_eq!((code, errors.as_str()), (52, ""), "{text}");
    let line = text.lines().last().unwrap();
    assert!(line.starts_with("missing  GPU          attention cannot be tried: "), "{line}");
}

#[test]
fn the_command_of_a_trial_is_for_the_program_alone() {
    let (code, help, _) = finish(program(&["--help"]));
    assert_eq!(code, 0);
    assert!(help.contains("doctor") && !help.contains("attention-trial"), "{help}");
    let (code, _, errors) = finish(program(&["attention-trial", "{}"]));
    assert_eq!(code, 52, "{errors}");
    assert!(errors.contains("no request of a trial: "), "{errors}");
}
