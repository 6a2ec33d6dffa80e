//! The migrations of each database, in order. Listed here rather than by sqlx's macro, which compiles its drivers a second time.

use sqlx::SqlSafeStr;
use sqlx::migrate::{Migration, MigrationType, Migrator};

pub fn sqlite() -> Migrator {
    migrator([
        (
            1,
            "jobs",
            include_str!("../../../migrations/sqlite/0001_jobs.sql"),
        ),
        (
            2,
            "results",
            include_str!("../../../migrations/sqlite/0002_results.sql"),
        ),
        (
            3,
            "operations",
            include_str!("../../../migrations/sqlite/0003_operations.sql"),
        ),
    ])
}

pub fn postgres() -> Migrator {
    migrator([(
        1,
        "jobs",
        include_str!("../../../migrations/postgres/0001_jobs.sql"),
    )])
}

fn migrator<const N: usize>(steps: [(i64, &'static str, &'static str); N]) -> Migrator {
    let migration = |(version, name, statements): (i64, &'static str, &'static str)| {
        Migration::new(
            version,
            name.into(),
            MigrationType::Simple,
            statements.into_sql_str(),
            false,
        )
    };
    Migrator::with_migrations(steps.into_iter().map(migration).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is not in the list would never run.
    #[test]
    fn every_file_is_listed() {
        for (database, migrator) in [("sqlite", sqlite()), ("postgres", postgres())] {
            let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("migrations")
                .join(database);
            let mut files: Vec<String> = std::fs::read_dir(folder)
                .expect("a folder")
                .map(|entry| entry.expect("a file").file_name().to_string_lossy().into_owned())
                .collect();
            files.sort();
            let listed: Vec<String> = migrator
                .iter()
                .map(|step| format!("{:04}_{}.sql", step.version, step.description))
                .collect();
            assert_eq!(listed, files);
        }
    }
}
