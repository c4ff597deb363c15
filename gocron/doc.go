// Package advisorygocron lets the schedulers of github.com/go-co-op/gocron/v2 that share a
// PostgreSQL database share their jobs, with the locks of [github.com/pgadvisory/advisory].
//
//	locker, err := advisorygocron.NewLocker(db, "billing", time.Minute)
//	…
//	scheduler, err := gocron.NewScheduler(gocron.WithDistributedLocker(locker))
//
// # Locker or Elector
//
// With a [Locker], each tick of a job runs on one of the schedulers, whichever asks first. It is for
// jobs whose ticks are meant to coincide: by CronJob, or by DurationJob with WithStartAt.
//
// With an [Elector], one scheduler, the leader, runs all jobs for as long as it lives. It holds one lock
// all the time, so that neither clocks nor the lengths of jobs matter.
//
// # Clocks that differ
//
// A lock that is held for a job's run alone does not make a tick run once. The clocks of the
// schedulers differ, and a job may be over before the next clock strikes: that scheduler would find
// the lock free, and run the same tick again (go-co-op/gocron#841). gocron does not tell a Locker
// which tick it asks for. So a Locker keeps each lock for some time even if the job ends sooner, by
// [advisory.AtLeast].
package advisorygocron
