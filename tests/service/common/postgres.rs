//! A PostgreSQL server of this test run, on a socket in a folder of its own. It ends with this process.

use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use sqlx::Connection;

/// Set where a missing server is an error, not a reason to skip.
const REQUIRED: &str = "CAULDRON_REQUIRE_POSTGRES";

pub struct Postgres {
    programs: PathBuf,
    dir: tempfile::TempDir,
    /// Who runs it: the server refuses to be root.
    user: Option<(u32, u32)>,
    running: Mutex<Option<Child>>,
}

impl Postgres {
    /// The server of this run; None where no programs are found. Then it says so, and loudly.
    pub fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Option<Postgres>> = OnceLock::new();
        SHARED.get_or_init(Self::start_new).as_ref()
    }

    /// One that may be stopped without disturbing others.
    pub fn start_new() -> Option<Self> {
        let Some(programs) = programs() else {
            assert!(
                std::env::var_os(REQUIRED).is_none(),
                "{REQUIRED} is set, and there is no postgres"
            );
            eprintln!("\n*** SKIPPED: no postgres here (Debian: apt-get install postgresql) ***\n");
            return None;
        };
        let dir = tempfile::Builder::new().prefix("pg").tempdir().unwrap();
        let root = rustix::process::geteuid().is_root();
        let user = root.then(|| id_of("postgres"));
        if let Some((uid, gid)) = user {
            chown(dir.path(), Some(uid), Some(gid)).unwrap();
        }
        let server = Self {
            programs,
            dir,
            user,
            running: Mutex::new(None),
        };
        let mut init = server.command("initdb");
        init.args(["--no-sync", "-A", "trust", "-U", "postgres", "-D"])
            .arg(server.data());
        assert!(init.stdout(Stdio::null()).status().unwrap().success());
        server.start();
        Some(server)
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command.current_dir(self.dir.path());
        command
    }

    /// Starts it, and returns when it answers.
    pub fn start(&self) {
        // The shell ends the server when its input ends: with this process at the latest.
        let script = r#""$1" -D "$2" -k "$3" -c listen_addresses= -c fsync=off -c max_connections=200 >"$2/log" 2>&1 & \
                       server=$!; cat >/dev/null; kill -INT $server; wait $server"#;
        let mut shell = Command::new("sh");
        shell
            .args(["-c", script, "sh"])
            .arg(self.programs.join("postgres"));
        shell.arg(self.data()).arg(self.dir.path()).stdin(Stdio::piped());
        if let Some((uid, gid)) = self.user {
            shell.uid(uid).gid(gid);
        }
        *self.running.lock().unwrap() = Some(shell.spawn().unwrap());
        let start = Instant::now();
        let mut ready = self.command("pg_isready");
        ready.arg("-q").arg("-h").arg(self.dir.path());
        while !ready.status().unwrap().success() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "postgres does not start"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Stops it as `pg_ctl stop -m fast` does.
    pub fn stop(&self) {
        let Some(mut child) = self.running.lock().unwrap().take() else {
            return;
        };
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    pub fn url(&self, database: &str) -> String {
        format!(
            "postgres:///{database}?host={}&user=postgres",
            self.dir.path().display()
        )
    }

    /// A new, empty database.
    pub async fn database(&self) -> String {
        let name = format!("t{}", uuid::Uuid::new_v4().simple());
        self.execute(&format!("CREATE DATABASE {name}")).await;
        self.url(&name)
    }

    /// Runs a statement outside of the databases of tests.
    pub async fn execute(&self, statement: &str) {
        let mut connection = sqlx::PgConnection::connect(&self.url("postgres")).await.unwrap();
        sqlx::raw_sql(sqlx::AssertSqlSafe(statement.to_owned()))
            .execute(&mut connection)
            .await
            .unwrap();
        connection.close().await.unwrap();
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The folder of the server's programs.
fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let mut found: Vec<PathBuf> = versions
        .filter_map(|v| Some(v.ok()?.path().join("bin")))
        .collect();
    found.sort();
    let in_path = std::env::var_os("PATH").unwrap_or_default();
    found.extend(std::env::split_paths(&in_path));
    let has_all = |dir: &Path| {
        ["postgres", "initdb", "pg_isready"]
            .iter()
            .all(|p| dir.join(p).is_file())
    };
    found.into_iter().rev().find(|dir| has_all(dir))
}

fn id_of(user: &str) -> (u32, u32) {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd.lines().find(|line| line.starts_with(&format!("{user}:")));
    let fields: Vec<&str> = line.expect("no user postgres").split(':').collect();
    (fields[2].parse().unwrap(), fields[3].parse().unwrap())
}
