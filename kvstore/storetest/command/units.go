package command

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"kvserver/kvstore/storetest/protocol"
)

// readmeFiles returns a directory with the files that the README shows, written as make dist writes
// them into archives.
func readmeFiles(t *testing.T) (dir string) {
	dir = t.TempDir()
	out, err := exec.Command("go", "run", ".ci/dist.go", "-files", dir).CombinedOutput()
	if err != nil {
		t.Fatalf("the README's files: %v\n%s", err, out)
	}
	return dir
}

// ReadmeUnit ensures that systemd, where it is installed, finds no mistake in the README's units,
// and few permissions that the server does not need.
func ReadmeUnit(t *testing.T, program protocol.Program) {
	t.Parallel()
	dir := readmeFiles(t)
	analyze := Tool(t, "systemd-analyze")
	if analyze == "" {
		return
	}

	units, _ := filepath.Glob(filepath.Join(dir, "kvserver*.*e*")) // services and timers
	args := []string{"verify"}
	for _, unit := range units {
		if strings.HasSuffix(unit, ".yml") {
			continue
		}
		text, _ := os.ReadFile(unit)
		os.WriteFile(unit, bytes.ReplaceAll(text, []byte("/usr/local/bin/kvserver"),
			[]byte(program().Path)), 0o600)
		args = append(args, unit)
	}

	if len(args) != 4 {
		t.Fatalf("the README has the units %q, want three", units)
	}
	if out, err := exec.Command(analyze, args...).CombinedOutput(); err != nil ||
		bytes.Contains(out, []byte(dir)) || bytes.Contains(out, []byte("kvserver.service:")) {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}

	// The score says how much is open, of 100, to somebody who has taken the server over.
	if out, err := exec.Command(analyze, "security", "--offline=true", "--threshold=20",
		filepath.Join(dir, "kvserver.service")).CombinedOutput(); err != nil {
		t.Errorf("systemd-analyze security: %v\n%s", err, out)
	}
}

// ReadmeAlerts ensures that Prometheus's own tool, where it is installed, accepts the README's
// rules; that each alert fires in its case; and that none fires for servers that have just started,
// beside one that stands by and another program that is down.
func ReadmeAlerts(t *testing.T, atStart func(t *testing.T) map[string]string) {
	t.Parallel()
	dir := readmeFiles(t)
	rules, _ := os.ReadFile(filepath.Join(dir, "kvserver.rules.yml"))
	names := regexp.MustCompile(`alert: Kvserver(\w+)`).FindAllStringSubmatch(string(rules), -1)
	if len(names) != len(alertCases) {
		t.Errorf("the README has %d alerts, want %d", len(names), len(alertCases))
	}

	promtool := Tool(t, "promtool")
	if promtool == "" {
		return
	}
	os.WriteFile(filepath.Join(dir, "tests.yml"), []byte(alertTests(atStart(t))), 0o600)
	for _, args := range [][]string{{"check", "rules", "kvserver.rules.yml"},
		{"test", "rules", "tests.yml"}} {
		cmd := exec.Command(promtool, args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", args, err, out)
		}
	}

	config, _ := os.ReadFile(filepath.Join(dir, "prometheus.yml"))
	if out, err := exec.Command(promtool, "check", "config", filepath.Join(dir,
		"prometheus.yml")).CombinedOutput(); err != nil {
		t.Errorf("promtool check config: %v\n%s\n%s", err, out, config)
	}
}

// alertCases has, by alert, the series that are not as at the start.
var alertCases = map[string]map[string]string{
	"NobodyServes":   {"kvserver_active": "1x15 0x45"},
	"Down":           {"up": "1x15 0x45", "kvserver_active": "1x15 _x45"},
	"Restarted":      {"kvserver_uptime_seconds": "900+60x15 0+60x45"},
	"Errors":         {"kvserver_log_errors_total": "0x25 1x35"},
	"LogLost":        {"kvserver_log_lines_lost_total": "0x25 7x35"},
	"WritesRefused":  {"kvserver_writes_refused_total": "0x27 3x33"},
	"Memory":         {"kvserver_memory_bytes": "950x60", "kvserver_memory_limit_bytes": "1000x60"},
	"SlowDisk":       {`kvserver_fsync_seconds_bucket{le="+Inf"}`: "0+9x60"},
	"Queues":         {"kvserver_queued_bytes": "600000000x60"},
	"RepliesDropped": {"kvserver_replies_dropped_total": "0x27 3x33"},
	"ClientsRefused": {"kvserver_clients_refused_total": "0x27 3x33"},
	"EtcdSlow":       {"kvserver_lock_age_seconds": "3.5x60"},
	"Takeover":       {"kvserver_takeovers_total": "2x25 3x35"},
}

// alertTests returns promtool's tests of the alerts. series are a server's at its start.
func alertTests(series map[string]string) string {
	text := "rule_files: [kvserver.rules.yml]\nevaluation_interval: 1m\n" +
		"tests:\n  - interval: 1m\n    input_series:\n"
	add := func(name, labels, values string) {
		name, own, _ := strings.Cut(strings.TrimSuffix(name, "}"), "{")
		text += fmt.Sprintf("      - {series: '%s{%s}', values: '%s'}\n", name, strings.Trim(own+","+labels, ","),
			values)
	}
	server := func(service string, changed map[string]string) {
		all := maps.Clone(series)
		maps.Copy(all, changed)
		for name, values := range all {
			add(name, fmt.Sprintf("job=%q,service=%q,instance=%[2]q", "kvserver", service), values)
		}
	}

	// Each case is a service of one server. Another service has a standby, and no alert.
	for name, changed := range alertCases {
		server(name, changed)
	}
	server("bills", nil)
	add("up", `job="kvserver",service="bills",instance="standby"`, "1x60")
	add("kvserver_active", `job="kvserver",service="bills",instance="standby"`, "0x60")
	add("up", `job="another"`, "0x60")

	// No alert is for the other service, and each case has its own.
	text += "    promql_expr_test:\n"
	for _, at := range []string{"1m", "10m", "30m", "59m"} {
		text += "      - {expr: 'ALERTS{service=~\"|bills\"}', eval_time: " + at + ", exp_samples: []}\n"
	}
	for name := range alertCases {
		text += fmt.Sprintf("      - {expr: 'count(ALERTS{alertname=\"Kvserver%s\",service=\"%[1]s\","+
			"alertstate=\"firing\"})', eval_time: 29m, exp_samples: [{labels: '{}', value: 1}]}\n", name)
	}
	return text
}
