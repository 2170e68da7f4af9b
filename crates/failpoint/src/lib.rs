//! Named places where a test makes a program die, or stop until the test has done something to it.
//!
//! Only with the feature `enabled`, and only as the environment orders:
//! `FAILPOINTS='NAME=return;NAME=stop(FOLDER);*=stop(FOLDER)'`. The first order for a name counts, `*` is
//! every name. `return` aborts there. `stop(FOLDER)` writes the place's name into the file `FOLDER/PID`
//! and stops the process, as SIGSTOP does, until SIGCONT. docs/state.md lists the names.

/// Dies or stops here if the environment says so.
#[cfg(any(feature = "enabled", test))]
pub fn hit(name: &str) {
    let orders = std::env::var("FAILPOINTS").unwrap_or_default();
    match enabled::action(&orders, name) {
        None => {}
        Some(enabled::Action::Die) => std::process::abort(),
        Some(enabled::Action::Stop(folder)) => enabled::stop(&folder, name),
    }
}

/// Nothing.
#[cfg(not(any(feature = "enabled", test)))]
pub fn hit(_: &str) {}

#[cfg(any(feature = "enabled", test))]
mod enabled {
    use rustix::process::{Signal, getpid, kill_process};
    use std::{fs, path::Path};

    #[derive(Debug, PartialEq, Eq)]
    pub enum Action {
        Die,
        Stop(String),
    }

    /// What `orders` have for the place.
    pub fn action(orders: &str, name: &str) -> Option<Action> {
        let mut orders = orders.split(';').filter_map(|order| order.split_once('='));
        let (_, action) = orders.find(|(place, _)| *place == name || *place == "*")?;
        match action.strip_prefix("stop(").and_then(|rest| rest.strip_suffix(')')) {
            Some(folder) => Some(Action::Stop(folder.to_owned())),
            None => (action == "return").then_some(Action::Die),
        }
    }

    /// A test that cannot stop the process where it wants to must not go on as if it had.
    pub fn stop(folder: &str, name: &str) {
        let file = Path::new(folder).join(std::process::id().to_string());
        let stopped =
            fs::write(&file, name).and_then(|()| Ok(kill_process(getpid(), Signal::STOP)?));
        if stopped.is_err() {
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::enabled::{Action, action};

    #[test]
    fn the_first_order_for_a_place_counts() {
        let orders = "a=return;b=stop(/x y);*=return";
        assert_eq!(action(orders, "a"), Some(Action::Die));
        assert_eq!(action(orders, "b"), Some(Action::Stop("/x y".to_owned())));
        assert_eq!(action(orders, "c"), Some(Action::Die));
        assert_eq!(action("a=off;b", "a"), None);
        assert_eq!(action("", "a"), None);
    }
}
