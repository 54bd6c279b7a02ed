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
//! | colours of JPEG files | `jpeg.rs` |
//! | frames of WebP files | `webp.rs` |
//! | the way to a bucket's size | `fit.rs` |
//! | resizing | `resize.rs` |
//! | frames of videos | `video/` |

mod fit;
mod jpeg;
mod picture;
mod read;
mod resize;
pub mod video;
mod webp;

pub use fit::{CropOffset, Fit, Size};
pub use picture::{Picture, stacked};
pub use read::{Limits, is_picture, picture_size};
