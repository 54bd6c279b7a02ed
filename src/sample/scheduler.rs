//! The scheduler of a published pipeline, by which its noise levels and its solver are those that
//! the model was published with.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Value, json};

use crate::config::RunConfig;
use crate::error::{Error, Result};
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

/// The scheduler that a pipeline was published with.
#[derive(Clone, Debug)]
pub struct Scheduler(Config);

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

impl Scheduler {
    /// Reads that of the configured pipeline; `None` without a pipeline or where it has none.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn of(config: &RunConfig) -> Result<Option<Self>> {
        config.sampling.pipeline.as_ref().map_or(Ok(None), |folder| Self::open(Path::new(folder)))
    }

    /// Reads the scheduler of a pipeline's folder; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Data`] naming the file if it cannot be read.
    pub fn open(pipeline: &Path) -> Result<Option<Self>> {
        let path = pipeline.join(FILE);
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::data(path, error.to_string())),
            Ok(_) => Config::open(&path).map(|fields| Some(Scheduler(fields))),
        }
    }

    /// Returns the family's `own` levels as the scheduler changes them. `solver`: the one to take
    /// whatever class it is of.
    ///
    /// # Errors
    /// [`Error::Data`] naming the field by which it does what no solver here does.
    pub fn levels(
        &self,
        own: NoiseLevels,
        solver: Option<Solver>,
        image_tokens: i64,
        num_train_timesteps: i64,
    ) -> Result<NoiseLevels> {
        self.check(&fixed_spacing(num_train_timesteps))?;
        let levels = match solver {
            Some(_) => own,
            None => own.with_solver(self.solver()?),
        };
        let levels = match (self.flag("use_dynamic_shifting"), own.shift()) {
            // The pipeline tells its scheduler this one.
            (true, Shift::Empirical { .. }) => levels,
            (true, Shift::Constant(_)) => levels.with_shift(self.shift_for(image_tokens)),
            (false, _) => levels.with_shift(self.constant_shift()),
        };
        Ok(levels.ending_at(self.number("shift_terminal")))
    }

    /// The solver that its class is.
    fn class(&self) -> Option<Solver> {
        let class = self.0.text("_class_name")?;
        CLASSES.into_iter().find(|(name, _)| *name == class).map(|(_, solver)| solver)
    }

    fn solver(&self) -> Result<Solver> {
        let Some(solver) = self.class() else {
            let class = self.0.text("_class_name").unwrap_or("no class");
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

    /// A file made from another class's has that class's field, too, which says nothing.
    fn constant_shift(&self) -> f64 {
        let field = if self.class() == Some(Solver::UniPc) { "flow_shift" } else { "shift" };
        self.number(field).unwrap_or(1.0)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// The levels of Wan with a pipeline whose scheduler has these fields.
    fn levels(fields: Value, solver: Option<Solver>) -> Result<NoiseLevels> {
        let pipeline = tempfile::tempdir().expect("a folder");
        fs::create_dir(pipeline.path().join("scheduler")).expect("a folder");
        fs::write(pipeline.path().join(FILE), fields.to_string()).expect("a file");
        let scheduler = Scheduler::open(pipeline.path())?.expect("it is there");
        scheduler.levels(NoiseLevels::down_to_training(2.0), solver, 4096, 1000)
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
    fn a_scheduler_that_is_missing_is_none_and_one_that_cannot_be_read_is_an_error() {
        let pipeline = tempfile::tempdir().expect("a folder");
        assert!(Scheduler::open(pipeline.path()).expect("nothing to read").is_none());
        fs::create_dir(pipeline.path().join("scheduler")).expect("a folder");
        symlink("/no/such/blob", pipeline.path().join(FILE)).expect("a link");
        let error = Scheduler::open(pipeline.path()).expect_err("a link to nothing").to_string();
        assert!(error.contains("scheduler_config.json: "), "{error}");
    }

    #[test]
    fn each_class_has_a_field_of_its_own_for_the_shift() {
        let fields = json!({
            "_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 8.0, "flow_shift": 5.0
        });
        let expected = NoiseLevels::down_to_training(8.0);
        assert_eq!(levels(fields, None).expect("sound"), expected);
        let expected = NoiseLevels::down_to_training(5.0).with_solver(Solver::UniPc);
        assert_eq!(levels(unipc("shift", json!(8.0)), None).expect("sound"), expected);
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
