//! Both halves against each other: a real FUSE mount, a pump, a socket pair, a confined server.
//!
//! This program is all of the processes: without arguments (or with a part of a test's name) it
//! runs tests, each in a child of its own. Root only. `bench` measures and checks nothing.

mod bench;
mod coherence;
mod files;
mod fixture;
mod guest_mounts;
mod hostile;
mod raw;
mod updates;

use std::process::{Command, ExitCode};

type Test = (&'static str, fn() -> anyhow::Result<()>);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["server", root] => fixture::server(root, false),
        ["server-after-init", root] => fixture::server(root, true),
        ["pump", target] => fixture::pump(target),
        ["mount-server", root] => fixture::mount_server(root),
        ["bench"] => bench::run(),
        ["lock", path] => return fixture::lock(path),
        ["test", name] => match tests().find(|test| test.0 == name) {
            Some((_, test)) => fixture::isolate().and_then(|()| test()),
            None => Err(anyhow::anyhow!("no test is called {name}")),
        },
        _ => return run_all(words.iter().find(|word| !word.starts_with('-')).copied()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn tests() -> impl Iterator<Item = Test> {
    let more = guest_mounts::TESTS.iter().chain(updates::TESTS);
    files::TESTS.iter().chain(coherence::TESTS).chain(hostile::TESTS).chain(more).copied()
}

fn run_all(filter: Option<&str>) -> ExitCode {
    let this = std::env::current_exe().expect("a test has a path");
    let mut failures = Vec::new();
    let mut count = 0;
    for (name, _) in tests() {
        if filter.is_some_and(|filter| !name.contains(filter)) {
            continue;
        }
        count += 1;
        let result = Command::new(&this).args(["test", name]).status();
        let passed = result.is_ok_and(|status| status.success());
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        if !passed {
            failures.push(name);
        }
    }
    println!("{count} tests, {} failed", failures.len());
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The list of a module's tests.
#[macro_export]
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub const TESTS: &[(&str, fn() -> anyhow::Result<()>)] =
            &[$((stringify!($name), $name)),*];
    };
}
