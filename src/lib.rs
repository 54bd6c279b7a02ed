pub mod collective;
pub mod data;
pub mod doctor;
pub mod error;
pub mod registry;
pub mod rng;
pub mod settings;
pub mod tensor;
