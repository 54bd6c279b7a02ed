//! The scheduler of a published pipeline, by which its noise levels and its solver are those that
//! the model was published with.

use std::path::Path;

use serde_json::{Value, json};

use crate::error::Result;
use crate::flow::time_shift::shift_between;
use crate::flow::{NoiseLevels, Shift, Solver};
use crate::published::Config;

/// A pipeline's file that describes its scheduler.
const FILE: &str = "scheduler/scheduler_config.json";

/// Classes of diffusers with the solver that each is.
const CLASSES: [(&str, Solver); 2] = [
    ("FlowMatchEulerDiscreteScheduler", Solver::Euler),
    ("UniPCMultistepScheduler", Solver::UniPc),
];

/// A field, its one value that is followed here, and whether a class has it as the default.
type Fixed = (&'static str, Value, bool);

/// Returns the family's `own` levels as the pipeline's scheduler changes them, unchanged if the
/// folder has none. `solver`: the one to take whatever class the scheduler is of.
///
/// # Errors
/// [`Error::Data`](crate::error::Error::Data) naming the file if it cannot be read, or the field by
/// which the scheduler does what no solver here does.
pub fn published_levels(
    pipeline: &Path,
    own: NoiseLevels,
    solver: Option<Solver>,
    image_tokens: i64,
    num_train_timesteps: i64,
) -> Result<NoiseLevels> {
    let path = pipeline.join(FILE);
    if !path.exists() {
        return Ok(own);
    }
    let scheduler = Scheduler(Config::open(&path)?);
    scheduler.check(&fixed_spacing(num_train_timesteps))?;
    let levels = match solver {
        Some(_) => own,
        None => own.with_solver(scheduler.solver()?),
    };
    let levels = match (scheduler.flag("use_dynamic_shifting"), own.shift()) {
        // The pipeline tells its scheduler this one.
        (true, Shift::Empirical { .. }) => levels,
        (true, Shift::Constant(_)) => levels.with_shift(scheduler.shift_for(image_tokens)),
        (false, _) => levels.with_shift(scheduler.constant_shift()),
    };
    Ok(levels.ending_at(scheduler.number("shift_terminal")))
}

/// Fields that decide the spacing of the levels, with what is followed here.
fn fixed_spacing(num_train_timesteps: i64) -> Vec<Fixed> {
    vec![
        ("num_train_timesteps", json!(num_train_timesteps), true),
        ("use_karras_sigmas", json!(false), true),
        ("use_exponential_sigmas", json!(false), true),
        ("use_beta_sigmas", json!(false), true),
        ("invert_sigmas", json!(false), true),
        ("time_shift_type", json!("exponential"), true),
    ]
}

/// Fields that decide how a solver steps, with what is followed here.
fn fixed_solving(solver: Solver) -> Vec<Fixed> {
    match solver {
        Solver::Euler => vec![("stochastic_sampling", json!(false), true)],
        Solver::UniPc => vec![
            ("use_flow_sigmas", json!(true), false),
            ("prediction_type", json!("flow_prediction"), false),
            ("predict_x0", json!(true), true),
            ("solver_order", json!(2), true),
            ("solver_type", json!("bh2"), true),
            ("lower_order_final", json!(true), true),
            ("final_sigmas_type", json!("zero"), true),
            ("disable_corrector", json!([]), true),
            ("thresholding", json!(false), true),
        ],
    }
}

struct Scheduler(Config);

impl Scheduler {
    fn solver(&self) -> Result<Solver> {
        let class = self.0.text("_class_name").unwrap_or("no class");
        let Some((_, solver)) = CLASSES.into_iter().find(|(name, _)| *name == class) else {
            let what = format!(
                "is {class}; expected {} or {}. Set sampling.solver, or --solver, to generate by another way",
                CLASSES[0].0, CLASSES[1].0
            );
            return Err(self.0.refused(what));
        };
        self.check(&fixed_solving(solver))?;
        Ok(solver)
    }

    fn check(&self, fixed: &[Fixed]) -> Result<()> {
        for (field, expected, is_default) in fixed {
            let found = self.field(field);
            if found.map_or(*is_default, |found| found == expected) {
                continue;
            }
            let found = found.map_or("missing".into(), Value::to_string);
            let what = format!("`{field}` is {found}; samples are generated with {expected} only");
            return Err(self.0.refused(what));
        }
        Ok(())
    }

    /// A field that is neither missing nor null.
    fn field(&self, name: &str) -> Option<&Value> {
        self.0.fields().get(name).filter(|value| !value.is_null())
    }

    fn number(&self, name: &str) -> Option<f64> {
        self.field(name).and_then(Value::as_f64)
    }

    fn flag(&self, name: &str) -> bool {
        self.field(name).and_then(Value::as_bool).unwrap_or(false)
    }

    /// The shift that follows from the number of image tokens, by the line that the pipeline draws.
    fn shift_for(&self, image_tokens: i64) -> f64 {
        let point = |tokens: (&str, f64), shift: (&str, f64)| {
            let number = |(name, default)| self.number(name).unwrap_or(default);
            (number(tokens), number(shift))
        };
        let low = point(("base_image_seq_len", 256.0), ("base_shift", 0.5));
        let high = point(("max_image_seq_len", 4096.0), ("max_shift", 1.15));
        shift_between(image_tokens, low, high)
    }

    fn constant_shift(&self) -> f64 {
        self.number("flow_shift").or(self.number("shift")).unwrap_or(1.0)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The levels of Wan with a pipeline whose scheduler has these fields.
    fn levels(fields: Value, solver: Option<Solver>) -> Result<NoiseLevels> {
        let pipeline = tempfile::tempdir().expect("a folder");
        fs::create_dir(pipeline.path().join("scheduler")).expect("a folder");
        fs::write(pipeline.path().join(FILE), fields.to_string()).expect("a file");
        published_levels(pipeline.path(), NoiseLevels::down_to_training(2.0), solver, 4096, 1000)
    }

    fn unipc(field: &str, value: Value) -> Value {
        let mut fields = json!({
            "_class_name": "UniPCMultistepScheduler",
            "flow_shift": 5.0,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": true,
            "solver_p": null,
        });
        fields[field] = value;
        fields
    }

    #[test]
    fn a_pipeline_without_a_scheduler_changes_nothing() {
        let own = NoiseLevels::down_to_training(2.0);
        let pipeline = tempfile::tempdir().expect("a folder");
        let found = published_levels(pipeline.path(), own, None, 4096, 1000);
        assert_eq!(found.expect("nothing to read"), own);
    }

    #[test]
    fn class_and_shift_are_taken_unless_a_solver_is_chosen() {
        let by_unipc = NoiseLevels::down_to_training(5.0).with_solver(Solver::UniPc);
        assert_eq!(levels(unipc("thresholding", json!(false)), None).expect("sound"), by_unipc);
        let chosen = levels(unipc("solver_order", json!(3)), Some(Solver::Euler));
        assert_eq!(chosen.expect("its solver is not taken"), NoiseLevels::down_to_training(5.0));
    }

    #[test]
    fn what_no_solver_here_does_is_refused_by_field() {
        for (field, value) in [
            ("_class_name", json!("DPMSolverMultistepScheduler")),
            ("solver_order", json!(3)),
            ("use_flow_sigmas", Value::Null),
            ("use_karras_sigmas", json!(true)),
            ("num_train_timesteps", json!(500)),
        ] {
            let error = levels(unipc(field, value), None).expect_err(field).to_string();
            assert!(error.contains("scheduler_config.json: "), "{error}");
            let named = if field == "_class_name" { "is DPMSolver" } else { field };
            assert!(error.contains(named), "{error}");
        }
    }
}
