//! Errors as they fit into an answer: gRPC carries them in a header, and what quotes a huge field would
//! break the connection instead of telling anything.

/// Bytes kept of the beginning, which names the field or step, and of the end, which has the reason.
const HEAD: usize = 2048;
const TAIL: usize = 1024;

/// The text, without its middle where it is too long.
pub fn fitting(text: String) -> String {
    if text.len() <= HEAD + TAIL {
        return text;
    }
    let head = text.floor_char_boundary(HEAD);
    let tail = text.ceil_char_boundary(text.len() - TAIL);
    format!("{} [{} bytes] {}", &text[..head], tail - head, &text[tail..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_keeps_both_ends() {
        assert_eq!(fitting("short".to_owned()), "short");
        let long = format!("working_dir: {} is no path", "ü".repeat(1 << 20));
        let fits = fitting(long);
        assert!(fits.len() < 4096 && fits.starts_with("working_dir: ü"), "{fits}");
        assert!(fits.contains("[2094") && fits.ends_with("ü is no path"), "{fits}");
    }
}
