//! Pictures and videos: files read within limits, resized as the reference resizes them, and
//! written.
//!
//! [`Picture::read`] reads PNG, JPEG and WebP. [`Fit`] says how a picture comes to the size of a
//! bucket, and [`Picture::fitted`] does it. Videos are read and written by the program `ffmpeg`,
//! where there is one; a folder of frames needs none.
//!
//! | question | file |
//! |---|---|
//! | a picture's pixels, as a tensor and as a PNG | `picture.rs` |
//! | files of pictures, their limits and their formats | `read.rs` |
//! | resizing and cropping | `fit.rs` |
//! | frames of videos | `video/` |

mod fit;
mod picture;
mod read;
pub mod video;

pub use fit::{CropOffset, Fit, Size};
pub use picture::{Picture, stacked};
pub use read::{Limits, PICTURES, is_picture, picture_size};
