//! Signals by the names that images and the CRI use.

use crate::sandbox::SandboxError;
use a3s_box_api::cri::Signal;

/// SIGTERM: what a process is asked with when nobody says otherwise.
const DEFAULT: u32 = 15;
const RTMIN: u32 = 34;
const RTMAX: u32 = 64;

/// Names and numbers on x86-64 and arm64.
const NAMES: [(&str, u32); 35] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("RTMIN", RTMIN),
];

/// The signal that asks a container to end: CRI's, else the image's, else SIGTERM.
pub fn stop_signal(wanted: i32, image: Option<&str>) -> Result<u32, SandboxError> {
    let signal = Signal::try_from(wanted)
        .map_err(|_| SandboxError::invalid("stop_signal", format!("{wanted} is no signal")))?;
    if signal != Signal::RuntimeDefault {
        let name = signal.as_str_name().trim_start_matches("SIGNAL_");
        let name = name.replace("MINPLUS", "MIN+").replace("MAXMINUS", "MAX-");
        return number(&name)
            .ok_or_else(|| SandboxError::invalid("stop_signal", format!("{name} is no signal")));
    }
    match image {
        None | Some("") => Ok(DEFAULT),
        Some(text) => number(text).ok_or_else(|| {
            SandboxError::invalid("image.image", format!("its stop signal {text:?} is no signal"))
        }),
    }
}

/// The CRI's number for a signal, for ContainerStatus.
pub fn to_cri(signal: u32) -> Signal {
    let name = match signal {
        RTMIN => "SIGNAL_SIGRTMIN".to_owned(),
        RTMAX => "SIGNAL_SIGRTMAX".to_owned(),
        35..=49 => format!("SIGNAL_SIGRTMINPLUS{}", signal - RTMIN),
        50..=63 => format!("SIGNAL_SIGRTMAXMINUS{}", RTMAX - signal),
        plain => match NAMES.iter().find(|(_, number)| *number == plain) {
            Some((name, _)) => format!("SIGNAL_SIG{name}"),
            None => return Signal::RuntimeDefault,
        },
    };
    Signal::from_str_name(&name).unwrap_or(Signal::RuntimeDefault)
}

/// `SIGTERM`, `term`, `15`, `SIGRTMIN+3`, `RTMAX-1`.
fn number(text: &str) -> Option<u32> {
    if let Ok(number) = text.parse::<u32>() {
        return (1..=RTMAX).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(plus) = name.strip_prefix("RTMIN+") {
        return plus.parse().ok().map(|n: u32| RTMIN.saturating_add(n)).filter(|n| *n <= RTMAX);
    }
    if let Some(minus) = name.strip_prefix("RTMAX-") {
        return minus.parse().ok().and_then(|n| RTMAX.checked_sub(n)).filter(|n| *n >= RTMIN);
    }
    if name == "RTMAX" {
        return Some(RTMAX);
    }
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_of_the_cri_has_a_number_and_comes_back() {
        for value in 1..=65 {
            let number = stop_signal(value, None).unwrap();
            let again = to_cri(number);
            assert_eq!(stop_signal(again.into(), None).unwrap(), number, "{value}");
        }
        assert!(stop_signal(66, None).is_err());
    }

    #[test]
    fn the_containers_wish_is_stronger_than_the_images() {
        let quit = Signal::Sigquit.into();
        assert_eq!(stop_signal(quit, Some("SIGINT")).unwrap(), 3);
        for (image, expected) in
            [("SIGQUIT", 3), ("quit", 3), ("9", 9), ("SIGRTMIN+3", 37), ("RTMAX-2", 62), ("", 15)]
        {
            assert_eq!(stop_signal(0, Some(image)).unwrap(), expected, "{image}");
        }
        assert_eq!(stop_signal(0, None).unwrap(), 15);
        for bad in ["SIGFOO", "0", "65", "RTMIN+31", "RTMAX-31"] {
            assert!(stop_signal(0, Some(bad)).is_err(), "{bad}");
        }
    }
}
