//! `a3s-box-cri`: the command line of the CRI server.

use a3s_box_server::{
    check::{self, Severity},
    config::{self, Config},
    serve, version,
};
use anyhow::{Context, Result};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::{io::Write, path::PathBuf, process::ExitCode};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Kubernetes CRI server that runs every pod in a microVM of its own.
#[derive(Parser)]
#[command(name = "a3s-box-cri", disable_version_flag = true)]
struct Cli {
    /// Configuration file. Default: /etc/a3s-box/config.toml when it exists, else the defaults.
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// The configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Tells what this host can do for pods and what each lack costs. Exit code 0: nothing lacks,
    /// 1: pods run with less, 2: no pod runs.
    Check,
    /// Prints the version.
    Version,
}

#[derive(Subcommand)]
enum ConfigCommand {
    /// Prints the commented defaults.
    Default,
    /// Checks the configuration and tells all its problems.
    Check,
}

/// sysexits.h: the command line was wrong.
const EX_USAGE: u8 = 64;

fn main() -> ExitCode {
    let cli = match Cli::command().try_get_matches().and_then(|args| Cli::from_arg_matches(&args)) {
        Ok(cli) => cli,
        Err(error) => {
            let usage = error.use_stderr();
            return match error.print() {
                Ok(()) if !usage => ExitCode::SUCCESS,
                _ => ExitCode::from(EX_USAGE),
            };
        }
    };
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            // Nobody is left to be told when standard error is gone.
            writeln!(std::io::stderr(), "a3s-box-cri: {error:#}").unwrap_or_default();
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let mut out = std::io::stdout();
    match cli.command {
        None => server(load(cli.config)?).map(|()| ExitCode::SUCCESS),
        Some(Command::Check) => host(&load(cli.config)?),
        Some(Command::Version) => {
            writeln!(out, "a3s-box-cri {}", version::RUNTIME_VERSION)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Config { command: ConfigCommand::Default }) => {
            out.write_all(config::DEFAULT.as_bytes())?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Config { command: ConfigCommand::Check }) => {
            load(cli.config)?;
            writeln!(out, "ok")?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The named file; without a name the standard one, which may be absent.
fn load(path: Option<PathBuf>) -> Result<Config> {
    let standard = PathBuf::from(config::PATH);
    match path {
        Some(path) => Ok(Config::load(&path)?),
        None if standard.exists() => Ok(Config::load(&standard)?),
        None => Ok(Config::parse("", &config::beside::Beside::this_program())?),
    }
}

fn host(config: &Config) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let findings = runtime.block_on(check::check(config))?;
    let mut out = std::io::stdout();
    for finding in &findings {
        writeln!(out, "{finding}")?;
    }
    Ok(match check::worst(&findings) {
        Severity::Fine => ExitCode::SUCCESS,
        Severity::Less => ExitCode::from(1),
        Severity::Broken => ExitCode::from(2),
    })
}

fn server(config: Config) -> Result<()> {
    let filter = EnvFilter::try_new(&config.log).context("log")?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut term, mut int) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = async move {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
        };
        serve::serve(config, stop).await
    })
}
