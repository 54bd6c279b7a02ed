//! Sizes of latents by sizes of pixels.

/// How the latents of a model follow from pixels in number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Factors {
    /// Channels of pixels.
    pub colours: i64,
    /// Channels of a model's latents.
    pub channels: i64,
    /// Rows and columns of pixels for each of a model's latents.
    pub space: i64,
    /// Frames of pixels for each frame of latents after the first; `None` if the class takes
    /// pictures alone.
    pub time: Option<i64>,
}

impl Factors {
    /// Returns the shape of a model's latents `[C, (F,) H, W]` for pixels `[3, (F,) H, W]`.
    ///
    /// # Errors
    /// A text that tells why there are none for these pixels.
    pub fn latents(&self, pixels: &[i64]) -> Result<Vec<i64>, String> {
        let Factors { colours, channels, space, time } = *self;
        let (frames, height, width) = match (pixels, time) {
            (&[found, height, width], _) if found == colours => (None, height, width),
            (&[found, frames, height, width], Some(_)) if found == colours => {
                (Some(frames), height, width)
            }
            _ => {
                let axes = if time.is_some() { "(F,) H, W" } else { "H, W" };
                return Err(format!("takes pixels [{colours}, {axes}], not {pixels:?}"));
            }
        };
        if height < space || width < space || height % space != 0 || width % space != 0 {
            return Err(format!(
                "takes sides that are multiples of {space}, not {height} x {width}"
            ));
        }
        let after_first = frames.zip(time).map(|(frames, time)| (frames - 1, time));
        if let Some((rest, time)) = after_first.filter(|(rest, time)| *rest < 0 || rest % time != 0)
        {
            let frames = rest + 1;
            return Err(format!("takes 1 frame and multiples of {time} more, not {frames} frames"));
        }
        let frames = after_first.map(|(rest, time)| 1 + rest / time);
        let shape = [Some(channels), frames, Some(height / space), Some(width / space)];
        Ok(shape.into_iter().flatten().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIDEOS: Factors = Factors { colours: 3, channels: 16, space: 8, time: Some(4) };
    const PICTURES: Factors = Factors { channels: 128, space: 16, time: None, ..VIDEOS };

    #[test]
    fn latents_follow_from_pixels() {
        assert_eq!(VIDEOS.latents(&[3, 13, 64, 8]), Ok(vec![16, 4, 8, 1]));
        assert_eq!(VIDEOS.latents(&[3, 1, 64, 8]), Ok(vec![16, 1, 8, 1]));
        assert_eq!(VIDEOS.latents(&[3, 64, 8]), Ok(vec![16, 8, 1]));
        assert_eq!(PICTURES.latents(&[3, 64, 48]), Ok(vec![128, 4, 3]));
    }

    #[test]
    fn pixels_without_latents_are_told_why() {
        let said = |factors: Factors, pixels: &[i64]| factors.latents(pixels).unwrap_err();
        assert!(said(VIDEOS, &[3, 4, 64, 8]).ends_with("multiples of 4 more, not 4 frames"));
        assert!(said(VIDEOS, &[3, 0, 64, 8]).ends_with("not 0 frames"));
        assert!(said(PICTURES, &[3, 64, 40]).ends_with("multiples of 16, not 64 x 40"));
        assert!(said(PICTURES, &[3, 0, 16]).ends_with("not 0 x 16"));
        assert!(said(PICTURES, &[3, 1, 16, 16]).ends_with("[3, H, W], not [3, 1, 16, 16]"));
        assert!(said(VIDEOS, &[4, 16, 16]).ends_with("[3, (F,) H, W], not [4, 16, 16]"));
    }
}
